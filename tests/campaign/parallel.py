"""Threads that share samplers, and children forked while they solve."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import signal
import threading
import time
import warnings

import torch
from problems import Problem, random_problem
from torch import Tensor

import deqdiff_fast as dq

THREADS, SOLVES, FORKS, SECONDS = 4, 15, 40, 30.0
LARGEST = 3000


def small_problems(seed: int, count: int) -> list[Problem]:
    """Problems whose solves do not depend on how long they take."""
    number, found = 3 * 10**6, []
    while len(found) < count:
        problem, number = random_problem(seed, number), number + 1
        size = problem.noises[0].numel() * problem.chain.schedule.num_steps
        if size < LARGEST and problem.outcome.solver != "auto" and problem.noises[0].dtype != torch.bfloat16:
            found.append(problem)
    return found


def solve(sampler: dq.DEQSampler, problem: Problem) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw = torch.Generator().manual_seed(problem.seed)
        return sampler.sample(problem.noises[0], problem.kwargs, draw).sample


def in_another_process(sampler: dq.DEQSampler, problem_number: int, seed: int) -> Tensor:
    """For a process that was spawned: the sampler came as a pickle."""
    torch.set_num_threads(1)
    return solve(sampler, random_problem(seed, problem_number))


def threads(seed: int) -> list[str]:
    """Several threads solve the same problems with the same samplers."""
    problems = small_problems(seed, 8)
    samplers = [dq.DEQSampler(p.model, p.chain.schedule, **p.settings) for p in problems]
    expected, complaints = [solve(sampler, p) for sampler, p in zip(samplers, problems)], []

    def work(first: int) -> None:
        for k in range(first, first + SOLVES):
            one = k % len(problems)
            try:
                found = solve(samplers[one], problems[one])
            except Exception as caught:
                complaints.append(f"problem {problems[one].outcome.number}: {type(caught).__name__}: {caught}")
                continue
            off = float((found.double() - expected[one].double()).norm() / expected[one].double().norm())
            if off > 2 * problems[one].outcome.tol:
                complaints.append(f"problem {problems[one].outcome.number}: another sample in a thread, by {off:.1e}")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(THREADS)]
    for worker in workers:
        worker.start()
    complaints += forks(samplers, problems) if hasattr(os, "fork") else []
    for worker in workers:
        worker.join()
    return complaints


def forks(samplers: list[dq.DEQSampler], problems: list[Problem]) -> list[str]:
    """Children of a process whose threads solve."""
    complaints = []
    for k in range(FORKS):
        one = k % len(problems)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                solve(samplers[one], problems[one])
                solve(dq.DEQSampler(problems[one].model, problems[one].chain.schedule), problems[one])
                status = 0
            finally:
                os._exit(status)
        until = time.monotonic() + SECONDS
        done, status = 0, 0
        while not done and time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            time.sleep(0.002)
        if not done:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            complaints.append(f"a forked child hangs (problem {problems[one].outcome.number})")
        elif status:
            complaints.append(f"a forked child failed (problem {problems[one].outcome.number}, status {status})")
    return complaints


def copies(seed: int) -> list[str]:
    """Copies, pickles and pickles that travel to a spawned process solve as the original does."""
    complaints, travelling = [], []
    for problem in small_problems(seed, 8):
        settings = {key: value for key, value in problem.settings.items() if key != "draft"}
        settings["solver"] = "quasi-newton" if problem.outcome.solver == "draft" else settings["solver"]
        sampler = dq.DEQSampler(problem.model, problem.chain.schedule, **settings)
        expected = solve(sampler, problem)
        for name, way in (("copy", copy.copy), ("deepcopy", copy.deepcopy)):
            if not torch.equal(solve(way(sampler), problem), expected):
                complaints.append(f"problem {problem.outcome.number}: another sample of a {name}")
        try:
            pickle.dumps(sampler)
        except (AttributeError, pickle.PicklingError):  # the loop and levels of a chain are functions in functions
            continue
        travelling.append((sampler, problem, expected))
    if travelling:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for sampler, problem, expected in travelling:
                found = pool.apply(in_another_process, (sampler, problem.outcome.number, seed))
                if not torch.equal(found, expected):
                    complaints.append(f"problem {problem.outcome.number}: another sample in a spawned process")
    return complaints


def run(seed: int) -> list[str]:
    """Returns complaints."""
    return threads(seed) + copies(seed)
