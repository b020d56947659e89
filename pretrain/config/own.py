"""Settings of hooks and data of one's own. Each names the code that it sets; that is imported when a run opens."""

from __future__ import annotations

from typing import ClassVar

from pretrain.config.section import Section


class HookSection(Section):
    """Of a hook: a subclass, which `monitor.hooks` names as `module:Class`.

    hook: "module:Class" of the `pretrain.hooks.base.Hook`, made with these settings.
    """

    hook: ClassVar[str]


class OwnDataSection(Section):
    """Of data: a subclass, which `data.own.name` names as `module:Class`.

    opens: "module:Class" of the `pretrain.run_data.RunData`, whose `open` is called with the config and these settings.
    paths: those settings that are paths, which a launched run needs absolute.
    """

    opens: ClassVar[str]
    paths: ClassVar[tuple[str, ...]] = ()

    def planned_vocabulary(self) -> int | None:
        """The number of token ids, for a plan; None leaves it to `model.vocabulary`."""
        return None
