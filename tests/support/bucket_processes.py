"""Two hosts that save to a bucket: `python bucket_processes.py ADDRESS FOLDER`, started as a process of several.

Each has a folder of its own below FOLDER in place of a disk. Prints one JSON line.
"""

import json
import logging
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mer_r1_jax.cli import explained
from mer_r1_jax.parallel import processes
from mer_r1_jax.storage.run_directory import RunDirectory

WHOLE = np.arange(32, dtype=np.float32).reshape(8, 4)


def main(address: str, base: str) -> None:
    own = processes.index()
    folder, disk = None, f"{base}/host_{own}"
    if own == 0:
        folder = RunDirectory.open(address, {"name": "pair"}, local_dir=disk)
    opened = processes.exchange("the run's folder", folder and (folder.attempt, folder.resumed))[0]
    folder = folder or RunDirectory.join(address, *opened, process=own, local_dir=disk)
    mesh = jax.make_mesh((jax.device_count(),), ("fsdp",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P("fsdp"))
    with folder:
        logging.getLogger().warning("process %d speaks", own)
        checkpoints = folder.open_checkpoints("checkpoints", max_to_keep=1)
        for step in (1, 2):
            array = jax.make_array_from_callback(WHOLE.shape, sharding, lambda index, step=step: WHOLE[index] * step)
            folder.publish()
            checkpoints.save(step, {"w": array}, {"step": step})
        abstract = {"w": jax.ShapeDtypeStruct(WHOLE.shape, WHOLE.dtype, sharding=sharding)}
        restored = checkpoints.restore(abstract)
        shards = restored.arrays["w"].addressable_shards
        same = [bool(np.array_equal(shard.data, 2 * WHOLE[shard.index])) for shard in shards]
    print(json.dumps({"step": restored.step, "host": restored.host, "same": same}), flush=True)


if __name__ == "__main__":
    with explained(), processes.joined(), explained():
        main(*sys.argv[1:])
