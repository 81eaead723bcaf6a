//! Models that benchmarks train: their tensors, as the published architectures have them, and how long one GPU takes
//! for an iteration.

use std::time::Duration;

use clap::ValueEnum;

/// One tensor: its name in the reference implementation, and its shape.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<u64>,
}

impl Tensor {
    pub(crate) fn elements(&self) -> u64 {
        self.shape.iter().product()
    }
}

/// A model that is known by name. The image models are torchvision's, BERT is `bert-base-uncased` without a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Model {
    Alexnet,
    Vgg16,
    Vgg19,
    Resnet50,
    BertBase,
}

impl Model {
    /// As on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Alexnet => "alexnet",
            Self::Vgg16 => "vgg16",
            Self::Vgg19 => "vgg19",
            Self::Resnet50 => "resnet50",
            Self::BertBase => "bert-base",
        }
    }

    /// Trainable tensors, in the order of the reference implementation.
    pub(crate) fn tensors(self) -> Vec<Tensor> {
        let mut list = List::default();
        match self {
            Self::Alexnet => alexnet(&mut list),
            Self::Vgg16 => vgg(&mut list, [2, 2, 3, 3, 3]),
            Self::Vgg19 => vgg(&mut list, [2, 2, 4, 4, 4]),
            Self::Resnet50 => resnet50(&mut list),
            Self::BertBase => bert_base(&mut list),
        }
        list.0
    }

    /// Time of forward and backward pass on one GPU, in which a worker has nothing to send.
    ///
    /// From published measurements, each a batch over a throughput:
    /// * AlexNet (512 images, 2,987 a second), VGG16 (64, 154) and ResNet-50 (64, 219): one P100 with synthetic data,
    ///   TensorFlow's benchmarks of May 2017 (tensorflow/docs, `performance/benchmarks.md`).
    /// * VGG19: the VGG16 above, longer by the ratio of both in jcjohnson/cnn-benchmarks (Pascal Titan X, cuDNN 5.1, 16
    ///   images: 147.32 ms to 128.62 ms), since the former does not have it.
    /// * BERT-base: 32 sentence pairs of 128 tokens at 1.16 steps a second and V100, PaddlePaddle Fleet's BERT
    ///   benchmark of June 2019. The same with two, four and eight GPUs, so there is no communication to be seen in it.
    pub(crate) fn think_time(self) -> Duration {
        Duration::from_secs_f64(match self {
            Self::Alexnet => 512.0 / 2987.0,
            Self::Vgg16 => 64.0 / 154.0,
            Self::Vgg19 => 64.0 / 154.0 * (147.32 / 128.62),
            Self::Resnet50 => 64.0 / 219.0,
            Self::BertBase => 1.0 / 1.16,
        })
    }

    /// The model `scale` times as large: its tensors (each of at least one element, and no longer shaped) and its
    /// think time alike, so that the bytes pushed per second of thinking stay what they are.
    pub(crate) fn scaled(self, scale: f64) -> Scaled {
        let tensor = |tensor: Tensor| {
            let elements = ((tensor.elements() as f64 * scale).round() as u64).max(1);
            let shape = if scale == 1.0 { tensor.shape } else { vec![elements] };
            Tensor { shape, ..tensor }
        };
        Scaled {
            tensors: self.tensors().into_iter().map(tensor).collect(),
            think_time: self.think_time().mul_f64(scale),
        }
    }
}

/// See [`Model::scaled`].
#[derive(Clone, Debug)]
pub(crate) struct Scaled {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) think_time: Duration,
}

impl Scaled {
    pub(crate) fn elements(&self) -> u64 {
        self.tensors.iter().map(Tensor::elements).sum()
    }
}

/// Tensors in the making.
#[derive(Default)]
struct List(Vec<Tensor>);

impl List {
    fn add(&mut self, name: impl Into<String>, shape: &[u64]) {
        self.0.push(Tensor { name: name.into(), shape: shape.to_vec() });
    }

    /// A weight whose outermost dimension is that of its bias.
    fn with_bias(&mut self, name: &str, shape: &[u64]) {
        self.add(format!("{name}.weight"), shape);
        self.add(format!("{name}.bias"), &shape[..1]);
    }

    /// Scale and shift of a normalisation.
    fn norm(&mut self, name: &str, width: u64) {
        self.with_bias(name, &[width]);
    }
}

fn alexnet(list: &mut List) {
    let convolutions: [(u32, [u64; 4]); 5] = [
        (0, [64, 3, 11, 11]),
        (3, [192, 64, 5, 5]),
        (6, [384, 192, 3, 3]),
        (8, [256, 384, 3, 3]),
        (10, [256, 256, 3, 3]),
    ];
    for (at, shape) in convolutions {
        list.with_bias(&format!("features.{at}"), &shape);
    }
    for (at, shape) in [(1, [4096, 9216]), (4, [4096, 4096]), (6, [1000, 4096])] {
        list.with_bias(&format!("classifier.{at}"), &shape);
    }
}

/// Five blocks of so many convolutions; between two of them a ReLU, after each block a pooling.
fn vgg(list: &mut List, blocks: [u32; 5]) {
    let (mut at, mut from) = (0, 3);
    for (convolutions, to) in blocks.into_iter().zip([64, 128, 256, 512, 512]) {
        for _ in 0..convolutions {
            list.with_bias(&format!("features.{at}"), &[to, from, 3, 3]);
            (at, from) = (at + 2, to);
        }
        at += 1;
    }
    for (at, shape) in [(0, [4096, 25088]), (3, [4096, 4096]), (6, [1000, 4096])] {
        list.with_bias(&format!("classifier.{at}"), &shape);
    }
}

/// Bottlenecks of three convolutions each, the first of a layer with a projection beside it.
fn resnet50(list: &mut List) {
    list.add("conv1.weight", &[64, 3, 7, 7]);
    list.norm("bn1", 64);
    let mut from = 64;
    for (layer, (blocks, width)) in (1..).zip([(3, 64), (4, 128), (6, 256), (3, 512)]) {
        let to = 4 * width;
        for block in 0..blocks {
            let name = format!("layer{layer}.{block}");
            let shapes = [[width, from, 1, 1], [width, width, 3, 3], [to, width, 1, 1]];
            for (at, shape) in (1..).zip(shapes) {
                list.add(format!("{name}.conv{at}.weight"), &shape);
                list.norm(&format!("{name}.bn{at}"), shape[0]);
            }
            if block == 0 {
                list.add(format!("{name}.downsample.0.weight"), &[to, from, 1, 1]);
                list.norm(&format!("{name}.downsample.1"), to);
            }
            from = to;
        }
    }
    list.with_bias("fc", &[1000, 2048]);
}

fn bert_base(list: &mut List) {
    const WIDTH: u64 = 768;
    for (name, rows) in [("word", 30_522), ("position", 512), ("token_type", 2)] {
        list.add(format!("embeddings.{name}_embeddings.weight"), &[rows, WIDTH]);
    }
    list.norm("embeddings.LayerNorm", WIDTH);
    for layer in 0..12 {
        let name = format!("encoder.layer.{layer}");
        for part in ["self.query", "self.key", "self.value", "output.dense"] {
            list.with_bias(&format!("{name}.attention.{part}"), &[WIDTH, WIDTH]);
        }
        list.norm(&format!("{name}.attention.output.LayerNorm"), WIDTH);
        list.with_bias(&format!("{name}.intermediate.dense"), &[4 * WIDTH, WIDTH]);
        list.with_bias(&format!("{name}.output.dense"), &[WIDTH, 4 * WIDTH]);
        list.norm(&format!("{name}.output.LayerNorm"), WIDTH);
    }
    list.with_bias("pooler.dense", &[WIDTH, WIDTH]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn models_are_as_large_as_published() {
        // Parameters as the reference implementations count them.
        for (model, tensors, parameters) in [
            (Model::Alexnet, 16, 61_100_840),
            (Model::Vgg16, 32, 138_357_544),
            (Model::Vgg19, 38, 143_667_240),
            (Model::Resnet50, 161, 25_557_032),
            (Model::BertBase, 199, 109_482_240),
        ] {
            let list = model.tensors();
            assert_eq!(list.len(), tensors, "{}", model.name());
            assert_eq!(list.iter().map(Tensor::elements).sum::<u64>(), parameters, "{}", model.name());
            assert_eq!(model.scaled(1.0).elements(), parameters);
            let names: std::collections::HashSet<_> = list.iter().map(|tensor| &tensor.name).collect();
            assert_eq!(names.len(), tensors, "two tensors of {} share a name", model.name());
        }
    }

    #[test]
    fn layers_stand_where_the_reference_has_them() {
        let shape = |model: Model, name: &str| {
            let list = model.tensors();
            list.into_iter().find(|tensor| tensor.name == name).map(|tensor| tensor.shape)
        };
        assert_eq!(shape(Model::Vgg16, "features.28.weight"), Some(vec![512, 512, 3, 3]));
        assert_eq!(shape(Model::Vgg19, "features.34.weight"), Some(vec![512, 512, 3, 3]));
        assert_eq!(shape(Model::Resnet50, "layer4.0.downsample.0.weight"), Some(vec![2048, 1024, 1, 1]));
        assert_eq!(shape(Model::BertBase, "encoder.layer.11.output.dense.weight"), Some(vec![768, 3072]));
        assert_eq!(shape(Model::Alexnet, "classifier.1.bias"), Some(vec![4096]));
    }

    #[test]
    fn a_scale_changes_size_and_think_time_alike() {
        for model in Model::value_variants() {
            let (whole, tenth) = (model.scaled(1.0), model.scaled(0.1));
            let ratio = tenth.elements() as f64 / whole.elements() as f64;
            assert!((ratio - 0.1).abs() < 1e-3, "{}: {ratio}", model.name());
            let ratio = tenth.think_time.as_secs_f64() / whole.think_time.as_secs_f64();
            assert!((ratio - 0.1).abs() < 1e-6, "{}: {ratio}", model.name());
            assert_eq!(whole.tensors, model.tensors());
        }
    }
}
