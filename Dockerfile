# A CUDA machine's image: the torch wheels bring CUDA themselves, the host brings the driver.
#   docker build -t moe_train .
#   docker run --gpus all -v "$PWD/outputs:/home/trainer/moe_train/outputs" moe_train
#   docker run --gpus all moe_train pytest
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home trainer
USER trainer
WORKDIR /home/trainer/moe_train
ENV PATH="/home/trainer/.local/bin:$PATH" PYTHONUNBUFFERED=1

# Dependencies first: they change less often than the code.
COPY --chown=trainer pyproject.toml README.md LICENSE ./
RUN mkdir moe_train && touch moe_train/__init__.py && pip install --no-cache-dir -e ".[dev,gpu]"
COPY --chown=trainer . .
RUN mkdir -p outputs

CMD ["accelerate", "launch", "train.py"]
