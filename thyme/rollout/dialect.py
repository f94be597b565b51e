"""The dialect of a checkpoint: how it is prompted and what words its sandbox uses, as `thyme.json` beside it says.

Without that file a folder is one of the released Thyme checkpoints where its model card or its name says so, and they
are run as they were trained; any other is taken for an ordinary Qwen2.5-VL: the full prompts, the plain words.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from thyme.rollout.config import Compat
from thyme.rollout.prompts import PromptStyle

FILE = "thyme.json"
RELEASED_OWNERS = "Kwai-Keye|yifanzhang114"
_CARD = re.compile(rf"^\s*-\s*(?:{RELEASED_OWNERS})/Thyme-(?:SFT|RL)\s*$", re.MULTILINE | re.IGNORECASE)
_NAME = re.compile(rf"(?:(?:{RELEASED_OWNERS})(?:--|_))?Thyme-(?:SFT|RL|7B)", re.IGNORECASE)
_CACHE = re.compile(rf"models--(?:{RELEASED_OWNERS})--Thyme(?:-SFT|-RL)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """What a model was trained under and must be run under."""

    prompt_style: PromptStyle = "thyme"
    """See RolloutConfig.prompt_style."""
    compat: Compat = "none"
    """See RolloutConfig.compat; it decides wording and rewriting of code together."""

    def __post_init__(self) -> None:
        for name, allowed in (("prompt_style", get_args(PromptStyle)), ("compat", get_args(Compat))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} must be one of {', '.join(allowed)}")


def read_dialect(folder: Path) -> Dialect | None:
    """What `thyme.json` in the folder says; None without one.

    Raises:
        ValueError: the file is there but cannot be read, or says what is unknown.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        said = json.loads(path.read_text())
        return Dialect(**said)
    except (ValueError, TypeError, OSError) as error:
        raise ValueError(f'{path}: expected such as {{"prompt_style": "thyme", "compat": "none"}} ({error})') from None


def is_released(folder: Path) -> bool:
    """Whether the folder is a download of Kwai-Keye/Thyme-SFT or Thyme-RL.

    Its model card names their data sets, the folder is called so, or it lies in the hub's cache of one of them.
    """
    card = folder / "README.md"
    if card.is_file() and _CARD.search(card.read_text("utf-8", errors="replace")):
        return True
    return _NAME.fullmatch(folder.absolute().name) is not None or any(map(_CACHE.fullmatch, folder.absolute().parts))


def write_dialect(folder: Path, dialect: Dialect) -> None:
    """Writes `thyme.json`, so that whoever loads the checkpoint runs it as it was trained."""
    (folder / FILE).write_text(json.dumps(asdict(dialect)) + "\n")
