"""The ground every kvmesh process stands on; imports no torch."""

__version__ = "0.1.0"
