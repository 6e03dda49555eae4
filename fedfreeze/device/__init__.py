"""What one emulated device does, needs and may not exceed."""
