"""The bundled model `emoji`."""
