"""What a worker's dispatcher makes of commands in the order in which they came."""

import queue
import threading
from pathlib import Path

import jax

from blitzjax.commands import CancelTransfer, LoadFromDisk
from blitzjax.config import Config
from blitzjax.engine.convert import TINY, write_random
from blitzjax.engine.loading import Holder, Loader
from blitzjax.engine.params import LayerStore
from blitzjax.events import Event, LayerLoaded, TransferEnded


def test_a_new_controllers_load_of_the_same_number_does_not_revive_a_cancelled_one(tmp_path: Path) -> None:
    write_random(tmp_path / "tiny", TINY, 0)
    store, ended = LayerStore(TINY, jax.devices()[:1]), queue.SimpleQueue[TransferEnded]()

    def emit(event: Event) -> None:
        match event:
            case LayerLoaded(units=1):  # in the middle of the first load
                loader.post(CancelTransfer("i0", 1))
                loader.post(LoadFromDisk("i0", 1, 1, "tiny"))
            case TransferEnded():
                ended.put(event)

    loader = Loader("i0", Config(), {"tiny": Holder(store, tmp_path / "tiny", lambda: None)}, None, {}, emit)
    threading.Thread(target=loader.run, daemon=True).start()
    loader.post(LoadFromDisk("i0", 1, 0, "tiny"))
    ends = [(e.units, e.error) for e in (ended.get(timeout=60), ended.get(timeout=60))]
    assert ends == [(1, "cancelled"), (TINY.units, "")]
