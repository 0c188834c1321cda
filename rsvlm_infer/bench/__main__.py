"""`python -m rsvlm_infer.bench` is `rsvlm bench`. Knows nothing else."""

from __future__ import annotations

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
