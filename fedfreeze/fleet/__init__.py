"""The fleet: devices with memory, speed, network and availability, from figures, classes of devices or a CSV file."""
