"""Properties of materials and molecules on a potential energy surface, each a value with an error bar."""
