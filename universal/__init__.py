"""What goes beyond the foundational experiment."""
