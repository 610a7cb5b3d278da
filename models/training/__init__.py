"""From a folder of images to a published model: dataset -> split -> train the head or the whole network -> evaluate -> publish."""
