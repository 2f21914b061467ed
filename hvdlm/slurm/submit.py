"""Check a run's jobs and hand them in: a chain, of which each goes on where the one before it stopped."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from hvdlm.cluster import batch_script
from hvdlm.cluster.finding import Finding
from hvdlm.cluster.queue import hand_in
from hvdlm.config import EXIT_CRASH, EXIT_DONE, EXIT_USAGE, UserError
from hvdlm.config.parse import folder_of, load_config
from hvdlm.run import jobs
from hvdlm.slurm.lints import Planned, lint
from hvdlm.slurm.site import Site, find_script, read_site

_OWN = ("--site", "--nodes", "--chain", "--time", "--script")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--site", metavar="SITE", default=os.environ.get("HVDLM_SITE", "generic"),
        help="a file of slurm/sites by its name, or any by its path (default: HVDLM_SITE, else generic)",
    )  # fmt: skip
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="nodes of each job (default: the site's, the script's)"
    )
    parser.add_argument("--time", metavar="T", help="time limit of each job, as sbatch takes it")
    parser.add_argument("--chain", type=int, metavar="K", default=3, help="jobs in all (default: 3)")
    parser.add_argument(
        "--script", metavar="FILE", default="train_64gpu.sh",
        help="a batch script by its path, or one of slurm/ by its name (default: train_64gpu.sh)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check, print the command, hand in nothing")
    parser.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="everything else: those of train")


def separate(argv: list[str]) -> list[str]:
    """Put `--` before the first argument that is train's, where the user has not."""
    if "--" in argv:
        return argv
    i = 0
    while i < len(argv):
        if argv[i] in _OWN:
            i += 2
        elif argv[i] in ("--dry-run", "--help", "-h") or argv[i].startswith(tuple(f"{own}=" for own in _OWN)):
            i += 1
        else:
            return [*argv[:i], "--", *argv[i:]]
    return argv


def run(args: argparse.Namespace) -> int:
    """Returns: 0, or 2 where a finding is an error.

    Raises:
        UserError: configuration, site or script are refused, or sbatch is.
    """
    if args.chain < 1:
        raise UserError(f"--chain {args.chain}: must be at least 1")
    config, recipe = load_config(args.arguments, prog="python -m hvdlm.train")
    folder = folder_of(config, recipe)
    site, script = read_site(args.site), find_script(args.script)
    options = [f"--job-name={jobs.job_name(folder)}", *site.sbatch_options, *_own_options(args)]
    arguments = [*options, str(script), *args.arguments]
    as_seen = (
        batch_script.of_script(script)
        | batch_script.of_variables(os.environ | site.variables)
        | batch_script.of_words(options)
    )
    findings = lint(Planned(as_seen, script, arguments, site, config, folder, args.chain))
    for finding in findings:
        print(line(finding), file=sys.stderr, flush=True)
    if any(finding.state == "fail" for finding in findings):
        return EXIT_USAGE
    if args.dry_run:
        print(f"HVDLM_SITE={site.path} sbatch {shlex.join(arguments)}")
        return EXIT_DONE
    _hand_in(arguments, site, folder, chain=args.chain)
    return EXIT_DONE


def line(finding: Finding) -> str:
    """One finding for people."""
    word = "error" if finding.state == "fail" else "warning"
    return (
        f"hvdlm slurm: {word}: {finding.name}: {finding.found}; needed: {finding.needed}; do: {finding.fix}"
    )


def _own_options(args: argparse.Namespace) -> list[str]:
    nodes = [f"--nodes={args.nodes}"] if args.nodes else []
    return [*nodes, *([f"--time={args.time}"] if args.time else []), "--dependency=singleton"]


def _hand_in(arguments: list[str], site: Site, folder: Path, *, chain: int) -> None:
    """Hand in the jobs one after the other.

    Raises:
        UserError: Slurm refuses one; those before it stay.
    """
    env = site.variables | {"HVDLM_SITE": str(site.path)}
    for number in range(1, chain + 1):
        # Requeued by Slurm, a job would keep its successors waiting for two minutes; the last has none.
        again = ["--no-requeue"] if number < chain else []
        job, trouble = hand_in([*again, *arguments], env=env)
        if not job:
            raise UserError(f"job {number} of {chain}: {trouble}", EXIT_CRASH)
        jobs.note(folder, job, jobs.SUBMITTED)
        print(f"job {job}", flush=True)
    print(f"{folder}: {chain} job(s); look after them: python -m hvdlm.slurm status {folder}")
