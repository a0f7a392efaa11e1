"""What an ablation may say of a claim; apart from what measures it, so that a page can be read without torch."""

from __future__ import annotations

from typing import Literal

Ruling = Literal["supported", "not supported", "contrary"]
SUPPORTED: Ruling = "supported"
NOT_SUPPORTED: Ruling = "not supported"
CONTRARY: Ruling = "contrary"
