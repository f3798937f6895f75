from .dial import Wire as SessionTransport

__all__ = ("SessionTransport",)
