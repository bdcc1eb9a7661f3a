"""Moving page records between the device pool and the host arena."""
