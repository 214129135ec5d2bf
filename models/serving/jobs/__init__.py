"""Asynchronous inference: hand a request in, ask for its answer later. Durable, bounded, each caller for themselves."""

from models.serving.jobs.desk import Jobs
from models.serving.jobs.job import Job, JobLimits, status_of
from models.serving.jobs.runner import RunnerSettings
from models.serving.jobs.store import JobStore
from models.serving.jobs.webhook import Webhooks

__all__ = ["Job", "JobLimits", "JobStore", "Jobs", "RunnerSettings", "Webhooks", "status_of"]
