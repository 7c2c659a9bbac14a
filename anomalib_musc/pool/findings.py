# SPDX-License-Identifier: Apache-2.0
"""What is found out about image files while they are read."""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from anomalib_musc.pool.looks import Look


@dataclass(frozen=True)
class Findings:
    """What was found out about image files.

    Attributes:
        skipped: Files that were left out, and why.
        sizes: (width, height) of the files, by name.
        high_bit_depth: Names of the grey images of more than 8 bits.
        thumbnails: Small pictures, by name, where they are made.
        orientations: EXIF orientations, by name, of the images that are stored otherwise than viewers show them.
        notes: What is to be said of images, by name.
        looks: What a glance at the images shows, by name.
    """

    skipped: dict[Path, str] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    high_bit_depth: set[str] = field(default_factory=set)
    thumbnails: dict[str, bytes] = field(default_factory=dict)
    orientations: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    looks: dict[str, Look] = field(default_factory=dict)

    @classmethod
    def joined(cls, findings: Iterable["Findings"]) -> "Findings":
        """Return what several processes have found out together."""
        every = cls()
        for found in findings:
            for name in (one.name for one in fields(cls)):
                getattr(every, name).update(getattr(found, name))
        return every
