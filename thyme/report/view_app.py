"""The server of `thyme view`: one run, or two side by side, as addresses that answer in JSON."""

from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from thyme.report.page import VIEW, linked_page
from thyme.report.run_folder import RunFolder
from thyme.report.web import answered, application, page_answer, picture_answer


def view_app(runs: Mapping[str, RunFolder], host: str = "127.0.0.1") -> Starlette:
    """The application.

    Args:
        runs: by "a", and "b" where two are compared.
        host: the name or address that it is reached under.
    """

    def run_of(request: Request) -> RunFolder:
        return runs[request.path_params["run"]]

    def rollout(request: Request) -> object:
        return run_of(request).rollout(request.path_params["file"], request.path_params["line"])

    def find(request: Request) -> object:
        asked = request.query_params
        return run_of(request).find(asked.get("question", ""), asked.get("near", ""))

    def picture(request: Request) -> Response:
        return picture_answer(request, run_of(request).pictures)

    title = " and ".join(run.name for run in runs.values())
    return application(
        [
            Route("/", lambda _: page_answer(linked_page(f"{title} - thyme view", VIEW))),
            Route("/api/runs", answered(lambda _: {key: run.described() for key, run in runs.items()})),
            Route("/api/{run}/metrics", answered(lambda request: run_of(request).metrics())),
            Route("/api/{run}/alarms", answered(lambda request: run_of(request).alarms())),
            Route("/api/{run}/find", answered(find)),
            Route("/api/{run}/table/{file}", answered(lambda r: run_of(r).table(r.path_params["file"]))),
            Route("/api/{run}/rollout/{file}/{line:int}", answered(rollout)),
            Route("/picture/{run}/{name}", picture),
        ],
        host,
    )
