"""The demo checkpoint: what it is taught, how it is trained, and how it is examined.

words, cells     what the little world consists of, and how it is drawn
pictures, videos, chats, tools, code, functions      lessons: samples of one kind each
split            which combinations are never trained on
lessons          all of them, and how often each comes
tokenizer, template.jinja, files          the files beside the weights
encode, packing  samples -> tokens by the library's own prompt code -> batches of fixed shapes
kernels          the three operations in a form that can be differentiated
training, schedule, run                   a step, the learning rate, the loop and how it resumes
weights          tensors in Hugging Face's names and layouts
exam, quiz       accuracy on held-out samples: through the public interface, and while training
"""
