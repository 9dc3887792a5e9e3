"""The bundled model `fashion`."""
