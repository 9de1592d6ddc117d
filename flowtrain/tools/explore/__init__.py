"""A page in the browser on a trained model of images: samples, latents, paths and likelihoods.

`requests` has the types of requests, and `answers` computes their results from `session` (latents
and images), `edits`, `accounts` and `background`; none of them imports web code. `worker` computes
one result at a time, the newest first. `server` and `guard` are the only modules that speak HTTP.
The page itself is plain HTML, CSS and JavaScript in `static`.

The page describes an image by its source and the edits of its latent (`requests.Place`). So the
server keeps no state for a tab, apart from the images that were dropped in.
"""
