"""Reports from the files of runs: pictures, texts, the model card; the page of a run, of several, of a sweep."""
