import transformers_suite


def pytest_configure(config):
    for mark in transformers_suite.MARKS:
        config.addinivalue_line("markers", f"{mark}: a mark of Transformers' own tests")
