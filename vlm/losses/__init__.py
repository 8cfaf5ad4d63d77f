"""Loss terms as pure tensor functions."""
