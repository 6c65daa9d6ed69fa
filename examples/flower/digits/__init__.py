"""The digits, shared out to clients of Flower's."""
