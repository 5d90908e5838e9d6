pytest_plugins = ["tests.support.postgres", "tests.support.application", "tests.support.daemon"]
