"""A study of guidance on a bundled model: what is drawn, how it is measured, and the document it becomes."""
