"""Which content mode holds for a call: `content.mode`, unless a policy for its key, team or model says otherwise."""

from functools import lru_cache
from typing import get_args

from litellm_sqlalchemy.settings import ContentSettings, Mode

#: From the laxest to the strictest.
_MODES: tuple[Mode, ...] = get_args(Mode)
#: Answers that are remembered; a client may ask for any model, so their number has a limit.
_REMEMBERED = 4096


class Policy:
    """Answers in a fraction of a microsecond for a caller and model that were seen before."""

    def __init__(self, content: ContentSettings) -> None:
        """Take the settings."""
        self._default = content.mode
        self._keys, self._teams, self._models = (
            (
                {name: mode for name, mode in modes.items() if not name.endswith("*")},
                [(name[:-1], modes[name]) for name in sorted(modes, key=len, reverse=True) if name.endswith("*")],
            )
            for modes in (content.policies.keys, content.policies.teams, content.policies.models)
        )
        everything = [content.mode, *(m for kind in content.policies for m in kind[1].values())]
        #: Holds for calls whose caller LiteLLM did not accept: nobody knows which policy would have held.
        self.strictest: Mode = max(everything, key=_MODES.index)
        #: Whether any mode keeps anything of a body.
        self.keeps_content = any(mode != "metadata" for mode in everything)
        self.mode = lru_cache(_REMEMBERED)(self._mode)

    def _mode(self, key_hash: str | None, key_alias: str | None, team: str | None, model: str | None) -> Mode:
        """Return the mode for a call that LiteLLM has accepted."""
        for (exact, beginnings), names in (
            (self._keys, (key_hash, key_alias)),
            (self._teams, (team,)),
            (self._models, (model,)),
        ):
            present = [name for name in names if name]
            for name in present:
                if name in exact:
                    return exact[name]
            for beginning, mode in beginnings:
                if any(name.startswith(beginning) for name in present):
                    return mode
        return self._default
