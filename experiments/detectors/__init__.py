"""What the detection experiment is made of: scenes, detectors, their training and testing."""
