"""SoftCFG inside other libraries' models: one package a library, imported by its name."""
