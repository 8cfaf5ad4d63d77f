"""What processes need before any model: guards, devices, seeds, ranks."""
