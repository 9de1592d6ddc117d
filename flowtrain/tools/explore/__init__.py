"""A page in the browser on a trained model of images: samples, latents, paths, and what the model
says about an image.

`asked` is what a page may send. `answers` is what it gets, from `session` (latents and images),
`edits`, `accounts` and `background`; none of them imports web code. `worker` computes one answer at
a time, the newest first. `server` and `guard` are the only modules that speak HTTP. The page itself
is plain HTML, CSS and JavaScript in `static`.

An image on the page is described by how it was made (`asked.Place`): a source, and what was done to
its latent. So the server keeps no state for a tab, apart from the images that were dropped in.
"""
