from tests.support.one_thread import one_thread  # noqa: F401  switched on by its name being here
