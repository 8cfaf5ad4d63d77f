"""Image encoder, text encoder, and the dual encoder that joins them."""
