"""The pages that each check of the browser looks at."""

# By the name of the screenshot. Add a page here, and it is looked at in all ways.
PATHS: dict[str, str] = {
    "overview": "/",
}
