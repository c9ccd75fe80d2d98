"""Sites: every matrix of a model behind one name, and the channels that can only be cut together."""

from __future__ import annotations

from .channels import ChannelGroup, Member
from .groups import channel_groups
from .opened import open_
from .rows import Geometry
from .site import Site, find, skipped, unwrap
from .surgery import Surgery

__all__ = [
    "ChannelGroup",
    "Geometry",
    "Member",
    "Site",
    "Surgery",
    "channel_groups",
    "find",
    "open_",
    "skipped",
    "unwrap",
]
