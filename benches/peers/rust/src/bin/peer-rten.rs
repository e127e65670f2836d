//! Runs one ONNX graph with rten.

use anyhow::Result;
use latile_peers::{Input, arguments, serve};
use rten::{Model, RunOptions, ThreadPool, Value, ValueOrView, ValueView};
use rten_tensor::Tensor;
use std::sync::Arc;

fn main() -> Result<()> {
    let args = arguments()?;
    let model = Model::load_file(&args.model)?;
    let pool = Arc::new(ThreadPool::with_num_threads(args.threads));
    let inputs: Vec<Value> = args
        .inputs
        .into_iter()
        .map(|input| match input {
            Input::Float(shape, data) => Value::from(Tensor::from_data(shape.as_slice(), data)),
            // rten holds ONNX' 64-bit integers as i32.
            Input::Int(shape, data) => {
                let data: Vec<i32> = data.into_iter().map(|v| v as i32).collect();
                Value::from(Tensor::from_data(shape.as_slice(), data))
            }
        })
        .collect();
    let (ids, output) = (model.input_ids().to_vec(), model.output_ids()[0]);
    serve(|| {
        let feed: Vec<_> = ids
            .iter()
            .zip(&inputs)
            .map(|(&id, value)| (id, ValueOrView::View(ValueView::from(value))))
            .collect();
        let options = RunOptions::default().with_thread_pool(Some(pool.clone()));
        let [value] = model.run_n(feed, [output], Some(options))?;
        let tensor: Tensor<f32> = value.try_into()?;
        Ok(tensor.into_data())
    })
}
