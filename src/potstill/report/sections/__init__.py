"""One module per section of the page: ``context(run)`` gives its template's values, or None where there is nothing."""
