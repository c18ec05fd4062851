"""Times on the device that is here: train steps at real sizes, and the report of them."""
