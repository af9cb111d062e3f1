"""What written networks are measured on and beside: networks that were never trained on, and Adam by the clock."""
