"""A Django project as `django-admin startproject` makes one, with a few views."""
