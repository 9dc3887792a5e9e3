"""SoftCFG inside other libraries' models: one module a library, imported by its name."""
