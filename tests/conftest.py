"""Makes the helper modules beside this file importable: pytest's import mode `importlib` adds no directory."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
