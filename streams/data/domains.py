"""Class folders of your own in several domains."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from driftline.core.errors import UserError
from driftline.streams.dataset import About, DomainData, Split
from driftline.streams.images import Files, image_folder, still_packed, subfolders

ABOUT = About(
    title="class folders by domain",
    paper="",
    published="any set of yours, for example DomainNet or Office-Home",
    licence="yours",
    layout="<data.root>/<domain>/train/<class>/<image> and .../test/<class>/<image>",
    label_space="",
)


@dataclass(frozen=True, kw_only=True)
class FolderDomains(DomainData):
    """Training and test images in class folders; without `domains` every folder is one, sorted."""

    about = ABOUT

    def read(self, root: Path) -> dict[str, Split]:
        names = self.domains or [n for n in subfolders(root) if (root / n / "train").is_dir()]
        if not names:
            packed = still_packed(root)
            raise UserError(f"no domains under data.root={root}. {packed}{ABOUT.expected}")

        def images(name: str, split: str) -> Files:
            return image_folder(root / name / split, ABOUT.expected)

        return {n: (images(n, "train"), images(n, "test")) for n in names}
