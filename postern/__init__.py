"""postern: papers as working parts. Run their claims, compare their methods, import them."""

__version__ = "0.1.0"
