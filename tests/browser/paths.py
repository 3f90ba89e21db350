"""The pages that each check of the browser looks at. A page of the list is looked at in all ways."""

# By the name of the screenshot. They are pages of the store that `tests/browser/content.py` fills.
PATHS: dict[str, str] = {
    "overview": "/",
    "images": "/images",
    "images-none": "/images?q=nothing-has-this-name",
    "image": "/images/nginx:1.27",
    "image-hostile": "/images/acme/hostile:latest",
    "image-packages": "/images/debian:12",
    "packages": "/packages?image=debian:12&q=ssl",
    "images-package": "/images?package=openssl%3C3.0.15",
    "images-package-wrong": "/images?package=openssl%3C",
    "remove": "/remove?image=nginx:1.27",
    "connect": "/connect",
    "settings": "/settings",
    "error": "/images/gone:1",
    "unknown": "/nothing/here",
    "search-none": "/search",
    "search": "/search?q=nginx",
    "unplug": "/unplug?list=nginx%3A1.27%0Aredis%3A7%0Ame%2Fnone%3A1%0ANOT%20ONE",
    "unplug-none": "/unplug",
    "activity": "/activity",
    "upstreams": "/upstreams",
    "storage": "/storage",
    "storage-preview": "/storage?glob=*",
    "policy": "/policy",
    "schedules": "/schedules",
}

# The pictures of README.md and docs, by the name of the file.
PICTURES: dict[str, str] = {
    "overview": "/",
    "images": "/images",
    "image": "/images/nginx:1.27",
    "unplug": "/unplug?list=nginx%3A1.27%0Apostgres%3A17%0Aredis%3A7%0Arabbitmq%3A4",
}
