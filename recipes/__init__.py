"""Training of the bundled models, and the study of guidance on them."""
