"""What a device that is here does: step times at real sizes, and the record of them."""
