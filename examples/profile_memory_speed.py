"""What do inserted convolutions cost? The same model with and without them, side by side.

python examples/profile_memory_speed.py
python examples/profile_memory_speed.py pvt_v2_b0 --batch-size 8 --trace traces
"""

import argparse
import copy
from pathlib import Path

import timm
import torch
from timm.data import resolve_model_data_config

import tokenconv as tc
from tokenconv.profiling import steady_allocator


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="vit_tiny_patch16_224", help="a timm model")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="keep profiler traces here")
    args = parser.parse_args()

    steady_allocator()  # or page faults blame the wrong operators; concerns the whole process
    torch.manual_seed(0)
    plain = timm.create_model(args.model)
    mixed = tc.insert_(copy.deepcopy(plain), "mix_ffn", kernel_size=3)
    input_size = resolve_model_data_config(plain)["input_size"]
    images = torch.randn(args.batch_size, *input_size)

    # From shapes alone: nothing runs, so this is exact, immediate and works for any size.
    for name, model in {"plain": plain, "mix_ffn": mixed}.items():
        cost = tc.cost(model, input_size)
        print(
            f"{name}: {cost.params:,} parameters, {cost.macs:,} MACs and "
            f"{cost.bytes / 2**20:.1f} MiB of traffic for one image"
        )

    # Measured: both models take turns on the same images, so that the ratio is a fair one.
    comparison = tc.compare(
        {"plain": plain, "mix_ffn": mixed},
        images,
        repeats=args.repeats,
        trace_dir=args.trace,
        progress=True,
    )
    print(f"\n{comparison}")

    if args.trace:
        print("\ntraces in TensorBoard: pip install 'tokenconv[profile]' once, then")
        print(f"  tensorboard --logdir {args.trace}")
        print("traces in Perfetto: drop one of these files on https://ui.perfetto.dev")
        print(f"  {args.trace}/*/*.pt.trace.json.gz")


if __name__ == "__main__":
    main()
