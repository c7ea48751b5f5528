qpipe_api = 1
