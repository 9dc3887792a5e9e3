"""The recipe of the bundled models of Fashion-MNIST."""
